"""Lets MindFormers 2.x be imported where `hyper_parallel` is not to be had; for the tests of hosts alone.

MindFormers 2.0 and 2.1 import `hyper_parallel` for models in PyNative mode. It is no package of PyPI (users have it
from where MindFormers' guide says), and static graphs, which are all that this project uses, never call it. Here
every name of it is an empty class. Installed by `tests/hosts.py` together with a .pth file that imports it.
"""

import importlib.abc
import importlib.machinery
import sys
import types

PACKAGE = "hyper_parallel"


class _EmptyClasses(type):
    """Classes whose attributes are further empty classes, as deep as they are asked for."""

    def __getattr__(cls, name):
        return _empty(name)


def _empty(name):
    if name.startswith("__"):  # inspect and pickle ask for these, and must be told that they are not there
        raise AttributeError(name)
    return _EmptyClasses(name, (), {"__init__": lambda self, *args, **options: None})


class _EmptyModule(types.ModuleType):
    __path__ = []

    def __getattr__(self, name):
        value = _empty(name)
        setattr(self, name, value)
        return value


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == PACKAGE:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return _EmptyModule(spec.name)

    def exec_module(self, module):
        """Nothing to execute."""


sys.meta_path.append(_Finder())  # last: the real package, where it is installed, is found first
