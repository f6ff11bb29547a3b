"""The mail sink of the benchmark: takes mail for anybody, keeps it in a maildir, and sends nothing on."""
