"""Makes the inspected Equinox modules readable on the API pages."""

import inspect
import re
from typing import Any

import griffe


def _short(annotation: Any) -> str | None:
    """`Float[jaxlib._jax.Array, ' n']` as it is written in the source."""
    if annotation is inspect.Signature.empty:
        return None
    text = inspect.formatannotation(annotation)
    text = re.sub(r"\b(?:\w+\.)+(?=\w)", "", text)
    return text.replace("'", '"')


def _is_field(member: griffe.Object | griffe.Alias) -> bool:
    # The default of a field carries the docstring of the default's type (or is an
    # alias, if it is a function from elsewhere). Fields are described under
    # **Arguments:** or **Attributes:** instead.
    if member.is_alias:
        return True
    return member.is_attribute and "property" not in member.labels


def _is_undocumented_init(member: griffe.Object | griffe.Alias) -> bool:
    if member.name != "__init__":
        return False
    docstring = member.docstring
    return docstring is None or docstring.value.startswith("Initialize self.")


class EquinoxModules(griffe.Extension):
    def on_class_members(self, *, node, cls: griffe.Class, agent, **kwargs) -> None:
        del node, agent, kwargs
        for name, member in list(cls.members.items()):
            if _is_field(member) or _is_undocumented_init(member):
                cls.del_member(name)

    def on_function_instance(
        self, *, node, func: griffe.Function, agent, **kwargs
    ) -> None:
        del agent, kwargs
        try:
            signature = inspect.signature(node.obj)
        except (AttributeError, TypeError, ValueError):
            return
        for parameter in func.parameters:
            if parameter.name in signature.parameters:
                annotation = signature.parameters[parameter.name].annotation
                parameter.annotation = _short(annotation)
        func.returns = _short(signature.return_annotation)
