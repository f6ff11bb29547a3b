"""Lets every TLS context of Python log its keys, also those that a program makes by hand.

ssl.create_default_context() does it by itself. Python imports this file at its start, because the runtime puts its folder first on
PYTHONPATH.
"""

import os
import sys

_here = os.path.dirname(os.path.abspath(__file__))
_log = os.environ.get("SSLKEYLOGFILE")


def _hook(ssl):
    context = getattr(ssl, "SSLContext", None)
    if not hasattr(context, "keylog_filename"):  # before Python 3.8
        return
    make = context.__new__

    def __new__(cls, *args, **kwargs):
        made = make(cls, *args, **kwargs)
        made.keylog_filename = _log
        return made

    context.__new__ = __new__


class _OnImport(object):
    """Hooks module ssl when the program imports it: loading it in every program would delay each start."""

    def find_spec(self, name, path=None, target=None):
        if name != "ssl":
            return None
        sys.meta_path.remove(self)
        from importlib.machinery import PathFinder

        spec = PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            _hook(module)

        spec.loader.exec_module = exec_module
        return spec


def _chain():
    """Runs the sitecustomize that this one has taken the place of."""
    path = [entry for entry in sys.path if os.path.abspath(entry or ".") != _here]
    if sys.version_info < (3, 5):
        import imp

        try:
            found = imp.find_module("sitecustomize", path)
        except ImportError:
            return
        imp.load_module("sitecustomize", *found)
        return
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec

    spec = PathFinder.find_spec("sitecustomize", path)
    if spec is not None and spec.loader is not None:
        module = module_from_spec(spec)
        sys.modules["sitecustomize"] = module
        spec.loader.exec_module(module)


if _log and sys.version_info >= (3, 8):
    if "ssl" in sys.modules:
        _hook(sys.modules["ssl"])
    else:
        sys.meta_path.insert(0, _OnImport())
_chain()
