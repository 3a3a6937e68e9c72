"""What both pages share: head, style, colours button, and a policy by which text in data can never run."""

from __future__ import annotations

from collections.abc import Sequence
from string import Template

from simba_lab.report.assets import asset, content_policy
from simba_lab.report.markup import escape


def page(
    heading: str, made: str, sections: Sequence[tuple[str, str]], body: str,
    eyebrow: str, title: str = "", assets: Sequence[str] = ("report",),
) -> str:  # fmt: skip
    """A whole page around the HTML ``body``.

    Args:
        heading: text above the page, and its title unless ``title`` is given; escaped here, as are the other words.
        made: the line below it.
        sections: id and title of those that a line of links leads to.
        assets: names of the style sheets and scripts beside this file, without their endings.
    """
    script = "".join(asset(f"{name}.js") for name in assets)
    return Template(asset("page.html")).substitute(
        title=escape(title or heading),
        heading=escape(heading),
        made=escape(made),
        eyebrow=escape(eyebrow),
        links="".join(f'<a href="#{key}">{escape(name)}</a>' for key, name in sections),
        policy=content_policy(script),
        style="".join(asset(f"{name}.css") for name in assets),
        script=script,
        body=body,
    )
