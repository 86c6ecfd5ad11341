"""Models, processes, and the training loop."""

import logging

# Before any module of this floor can import it: bitsandbytes tells which kernels it has not, and of its casts at every layer.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
