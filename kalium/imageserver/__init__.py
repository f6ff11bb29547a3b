"""The image server of the benchmark: HTTPS, TLS 1.2 and 1.3, files of one folder, and a log of what it was asked.

The log is written after the server's own decryption, so that it says what arrived and not what somebody claims to have sent.
"""
