"""The reference cache: schema, fingerprint, reader, writer."""
