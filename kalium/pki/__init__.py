"""The site's own CA, its certificates, and the operator's signing key.

`authority` makes and judges certificates and keys as values; `files` keeps them in a directory, renews them, and replaces
files whole or not at all. Everything may be repeated: what is there and good stays.
"""
