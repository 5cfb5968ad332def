from collections.abc import Sequence

import wadler_lindig as wl


def named_doc(name: str, docs: Sequence[wl.AbstractDoc], **kwargs) -> wl.AbstractDoc:
    # `name(...)`, for the `__pdoc__` of a module.
    begin, end = wl.TextDoc(name + "("), wl.TextDoc(")")
    return wl.bracketed(begin, list(docs), wl.comma, end, kwargs["indent"])
