"""The wire, tested as its specification reads: frames, streams, sessions, and bytes that nobody should send."""
