"""The harness's task whose requests are in lines of ``metadata.line_width`` characters.

Importing this module imports lm_eval; the harness itself does so, for YAML files that name it as their ``class``.
"""

from __future__ import annotations

from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask

from simba_lab.errors import InputError
from simba_lab.tasks.lines import wrap_request


class WrappedTask(ConfigurableTask):
    """A task as its YAML file says, whose contexts are wrapped before they are asked.

    Documents, choices and metrics are untouched: lengths of choices, by which acc_norm divides, are as published.
    Raises InputError for a task that does not score continuations: of a text that a model writes, or of one scored
    from its first word on, no context is left to wrap.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config={key: value for key, value in config.items() if key != "class"})
        self._line_width: int = self.config.metadata["line_width"]
        if self.OUTPUT_TYPE not in ("loglikelihood", "multiple_choice"):
            raise InputError(f"{self.config.task}: line_width is for tasks that score continuations")

    def construct_requests(self, doc: dict[str, Any], ctx: Any, **options: Any) -> list[Instance] | Instance:
        made = super().construct_requests(doc, ctx, **options)
        for request in made if isinstance(made, list) else [made]:
            request.arguments = wrap_request(*request.arguments, self._line_width)
        return made
