"""Functions of users, named in recipes and data as `package.module:function`."""

import difflib
import functools
import importlib
from collections.abc import Callable
from typing import Any

from bar_ray.types import UserError


@functools.cache
def load(kind: str, path: str) -> Callable[..., Any]:
    """The function; UserError when it is not there, with the nearest one that is."""
    module_name, _, function_name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UserError(f'the {kind} "{path}" cannot be imported: {error}.') from error
    function = vars(module).get(function_name)
    if not callable(function):
        near = difflib.get_close_matches(function_name, vars(module), 1)
        hint = f' Did you mean "{module_name}:{near[0]}"?' if near else ""
        raise UserError(f'module "{module_name}" has no function "{function_name}".{hint}')
    return function
