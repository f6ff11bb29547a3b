"""The controller: where each call stands in its app CFG, and what may happen next.

`state` decides and does no I/O; `dispatch` joins it with the sessions of kalium.protocol; `store` reads the directory of
signed policies; `redis_calls` keeps the calls of several controllers in a Redis, over `redis_link`, and `sharing` what else they have in
common; `config` and `tls` read files; `server` is the asyncio shell around them and `log` the one writer of lines.
"""
