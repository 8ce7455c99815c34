"""Objects of a user's own modules, by name: "my_module:make_net"."""

import importlib
import inspect
import re
import runpy
import sys
from typing import Any

from ldrld_jax.errors import UserError, as_user_error, one_line, unknown


def is_code(name: str) -> bool:
    """Returns whether a config's value names an object of a module.

    Example:
      >>> is_code("my_package.nets:make_net"), is_code("resnet8"), is_code("mnist:3.0.1")
      (True, False, False)
    """
    return re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name) is not None


def load_object(name: str) -> Any:
    """Imports `module:attribute` and returns the attribute; the working directory's modules are found first.

    The working directory stays on the path, as with `python -m`: the attribute may import when it is called, and worker
    processes import its module again.

    Raises:
      UserError: if there is no such module or attribute, or the module fails when it is imported.

    Example:
      >>> load_object("math:sqrt")(4.0)
      2.0
    """
    module_name, _, attribute = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise UserError(f"{name} cannot be imported: {one_line(error)} Install what it imports.") from error
        raise UserError(
            f"there is no module {error.name!r} for {name}, here or among the installed packages. Run in the folder "
            f"that holds it, or set PYTHONPATH."
        ) from None
    except Exception as error:
        raise UserError(f"{name} cannot be imported: {one_line(error)}") from error
    if not hasattr(module, attribute):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise unknown(f"object in module {module_name}", attribute, known)
    return getattr(module, attribute)


def call(name: str, *arguments: Any, **options: Any) -> Any:
    """Imports the function `module:function` and calls it.

    Raises:
      UserError: if it cannot be imported, or fails.

    Example:
      >>> call("math:sqrt", 4.0)
      2.0
    """
    function = load_object(name)
    with as_user_error(f"{name} failed"):
        return function(*arguments, **options)


def call_of_file(file: str, function: str, argument: str, *, kind: str, instead: str) -> Any:
    """Runs a Python file and calls one of its functions.

    Args:
      file: its path.
      function: the name of the function, which takes no argument or one.
      argument: for the function; "" for none.
      kind: of the file, for the error: "config" or "sweep".
      instead: what to give if the file has no such function.

    Raises:
      UserError: if the file or the function fails, or there is no such function, or it takes no argument.
    """
    with as_user_error(f"{kind} {file} failed", "Correct the file."):
        found = runpy.run_path(file).get(function)
        if found is None:
            raise UserError(f"{file} defines no {function}(). Add it, or give {instead}.")
        if argument and not inspect.signature(found).parameters:
            raise UserError(f"{file} takes no argument, got {argument!r}. Leave out the colon and what follows it.")
        return found(argument) if argument else found()
