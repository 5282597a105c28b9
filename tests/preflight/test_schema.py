"""Which keys a class takes."""

import pytest

from mindformers_glm32k.preflight.schema import constructor_keys


class StaticNew:
    def __new__(cls, first, second=1):
        return super().__new__(cls)


class Decorated:
    @staticmethod
    def __new__(cls, first, second=1):
        return object.__new__(cls)


class NotCallable(staticmethod):
    """A staticmethod as before Python 3.10: not callable, so inspect.signature refuses it."""

    __call__ = None


class AsOnPython39:
    __new__ = NotCallable(lambda cls, first, second=1: object.__new__(cls))


class ByClassMethod:
    __init__ = classmethod(lambda cls, first, second=1: None)


@pytest.mark.parametrize("cls", [StaticNew, Decorated, AsOnPython39, ByClassMethod])
def test_constructors_that_are_static_or_class_methods(cls):
    keys, closed = constructor_keys(cls)
    assert {"first", "second"} <= keys and closed
