"""Kalium mediates what serverless functions send: each message has to be the next one that the app's policy allows.

`policy` reads, compiles and executes policies, `protocol` is the wire between guard, agent and controller, `controller`
holds the cursors of live calls, `pki` makes certificates, `engine` runs functions behind the OpenFaaS API, `builder` makes
their images, `imageserver` and `mailsink` are services of the benchmark, and `cli` is the command `kalium`.
"""

__version__ = "0.1.0"
