"""The attack suite: one file per case, the runner, the receiver, and the capture that proves what left a sandbox.

A case is an exploit (Python source that the vulnerable variant of product-photos-3-receive executes) and the receiver that
would see its marker. Only what a receiver saw counts; a verdict is shown beside it and never stands in for it.
"""
