"""Predictions: one row per input, in columns."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias, overload

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastcascade.errors import DataError, InvalidArgument
from fastcascade.text import plain
from fastcascade.types import CascadeOutput

__all__ = ["INVALID", "Prediction", "Predictions"]

Column: TypeAlias = "np.ndarray[Any, Any]"

INVALID = "the logits are not finite; look for NaN or infinite pixels"

_SHOWN_ROWS = 10
_WIDTH = 80


class Prediction(NamedTuple):
    """One input's row; each field is a column of the output.

    Attributes:
        id: path of the image, or its index as text.
        label: class index; None if there is an error.
        class_name: name of the label; None if the cascade has no names.
        probability: of the label, at the exit where the image stopped.
        exit_stage: the stage after which the image stopped; None if it could not be read.
        cost_macs: multiplies spent; None if the image could not be read.
        error: the reason why there is no label, else None.
        top_labels: the most probable classes, most probable first; None if there is an error.
        top_probabilities: their probabilities.
    """

    id: str
    label: int | None = None
    class_name: str | None = None
    probability: float | None = None
    exit_stage: int | None = None
    cost_macs: int | None = None
    error: str | None = None
    top_labels: list[int] | None = None
    top_probabilities: list[float] | None = None


@dataclass(frozen=True, eq=False, repr=False)
class Predictions(Sequence[Prediction]):
    """Predictions of N inputs, in input order: a sequence of :class:`Prediction`, stored in columns.

    Attributes:
        ids: (N,) path or index of each input.
        label: (N,) int64 class index; −1 where there is an error.
        probability: (N,) float32 probability of the label; NaN where there is an error.
        exit_stage: (N,) int64; −1 for an input that could not be read.
        cost_macs: (N,) int64 multiplies spent; 0 for an input that could not be read.
        top_labels: (N, k) int64 most probable classes, ties in label order; −1 where there is an error.
        top_probabilities: (N, k) float32; NaN where there is an error.
        errors: position → reason why there is no label.
        classes: names in label order, or None.
    """

    ids: Sequence[str]
    label: Column
    probability: Column
    exit_stage: Column
    cost_macs: Column
    top_labels: Column
    top_probabilities: Column
    errors: Mapping[int, str]
    classes: tuple[str, ...] | None

    @classmethod
    def of_output(
        cls,
        ids: Sequence[str],
        unreadable: Sequence[str | None],
        out: CascadeOutput,
        top_k: int,
        classes: tuple[str, ...] | None,
    ) -> Predictions:
        """Rows from the output for the readable inputs.

        Args:
            unreadable: (N,) the reason why an input could not be read, or None.
            out: of the inputs that could.
            top_k: number of classes in ``top_labels``; 0 for none.
        """
        probs = out.probs.cpu().numpy()
        label, exit_stage, cost = (
            column.cpu().numpy() for column in (out.label, out.exit_stage, out.cost_macs)
        )
        score = np.take_along_axis(probs, label.clip(0)[:, None], 1)[:, 0]
        top = _top(probs, min(top_k, probs.shape[1]))
        top_probs = np.take_along_axis(probs, top, 1)
        top[label < 0] = -1
        columns = [label, score, exit_stage, cost, top, top_probs]
        errors = {i: reason for i, reason in enumerate(unreadable) if reason is not None}
        if errors:
            readable = np.array([reason is None for reason in unreadable], bool)
            fills = (-1, np.nan, -1, 0, -1, np.nan)
            columns = [_spread(column, readable, fill) for column, fill in zip(columns, fills, strict=True)]
        if (label < 0).any():
            errors.update((int(i), INVALID) for i in np.flatnonzero(columns[0] < 0) if int(i) not in errors)
        return cls(ids=ids, errors=errors, classes=classes, **dict(zip(_ARRAYS, columns, strict=True)))

    @classmethod
    def join(cls, parts: Sequence[Predictions]) -> Predictions:
        """Parts one after another.

        Raises:
            InvalidArgument: there are none.
        """
        if not parts:
            raise InvalidArgument("there are no predictions to join")
        starts = np.cumsum([0, *map(len, parts)]).tolist()
        columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in _ARRAYS}
        errors = {
            start + i: reason
            for start, part in zip(starts, parts, strict=False)
            for i, reason in part.errors.items()
        }
        ids = [i for part in parts for i in part.ids]
        return cls(ids=ids, errors=errors, classes=parts[0].classes, **columns)

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, index: int) -> Prediction: ...

    @overload
    def __getitem__(self, index: slice) -> Predictions: ...

    def __getitem__(self, index: int | slice) -> Prediction | Predictions:
        if not isinstance(index, slice):
            position = range(len(self))[index]
            return next(self._rows(range(position, position + 1)))
        chosen = range(len(self))[index]
        columns = {name: getattr(self, name)[index] for name in _ARRAYS}
        errors = {j: self.errors[i] for j, i in enumerate(chosen) if i in self.errors}
        ids = [self.ids[i] for i in chosen]
        return Predictions(ids=ids, errors=errors, classes=self.classes, **columns)

    def __iter__(self) -> Iterator[Prediction]:
        return self._rows(range(len(self)))

    def _rows(self, positions: range) -> Iterator[Prediction]:
        part = slice(positions.start, positions.stop)
        columns = [getattr(self, name)[part].tolist() for name in _ARRAYS]
        has_top = self.top_labels.shape[1] > 0
        for i, label, probability, exit_stage, cost, top, top_probs in zip(positions, *columns, strict=True):
            error = self.errors.get(i)
            ran = {} if exit_stage < 0 else {"exit_stage": exit_stage, "cost_macs": cost}
            if error is not None:
                yield Prediction(self.ids[i], error=error, **ran)
                continue
            name = None if self.classes is None else self.classes[label]
            best = (top, top_probs) if has_top else (None, None)
            yield Prediction(self.ids[i], label, name, probability, exit_stage, cost, None, *best)

    def require_no_errors(self) -> None:
        """Raise a :class:`DataError` if there is an error, with the first one."""
        if self.errors:
            first = min(self.errors)
            raise DataError(f"{self.ids[first]}: {self.errors[first]}")

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns: the fields of :class:`Prediction`; the top ones only if there are any."""
        return Prediction._fields if self.top_labels.shape[1] else Prediction._fields[:-2]

    def to_dict(self) -> dict[str, list[Any]]:
        """Column name → list of values, with None where there is none."""
        values = list(zip(*self, strict=True)) or [()] * len(Prediction._fields)
        return {name: list(column) for name, column in zip(self.columns, values, strict=False)}

    def to_arrow(self) -> Any:
        """A ``pyarrow.Table``.

        Raises:
            InvalidArgument: pyarrow is missing.
        """
        try:
            import pyarrow as pa
        except ImportError as error:
            raise InvalidArgument("Arrow tables need pyarrow: install fastcascade[data]") from error
        failed = np.zeros(len(self), bool)
        failed[list(self.errors)] = True
        unread = self.exit_stage < 0
        label = pa.array(self.label, mask=failed)
        reasons = [None] * len(self) if not self.errors else [self.errors.get(i) for i in range(len(self))]
        if self.classes is None:
            names = pa.nulls(len(self), pa.string())
        else:
            names = pa.array(self.classes, pa.string()).take(label)
        columns = [
            pa.array(self.ids, pa.string()),
            label,
            names,
            pa.array(self.probability, mask=failed),
            pa.array(self.exit_stage, mask=unread),
            pa.array(self.cost_macs, mask=unread),
            pa.array(reasons, pa.string()),
        ]
        if (k := self.top_labels.shape[1]) > 0:
            offsets = pa.array(np.arange(len(self) + 1, dtype=np.int32) * k)
            for values in (self.top_labels, self.top_probabilities):
                columns.append(
                    pa.ListArray.from_arrays(offsets, pa.array(values.reshape(-1)), mask=pa.array(failed))
                )
        return pa.table(columns, names=list(self.columns))

    def to_pandas(self) -> Any:
        """A ``pandas.DataFrame``.

        Raises:
            InvalidArgument: pandas is missing.
        """
        try:
            import pandas
        except ImportError as error:
            raise InvalidArgument("to_pandas needs pandas; install it, or use to_arrow or to_dict") from error
        return pandas.DataFrame(self.to_dict())

    def __repr__(self) -> str:
        text = io.StringIO()
        console = Console(file=text, width=_WIDTH, color_system=None)
        console.print(self.table())
        return "\n".join(line.rstrip() for line in text.getvalue().splitlines())

    def _repr_html_(self) -> str:
        """The same table for notebooks; names are escaped."""
        head, *rows = self._cells()
        cells = "".join(f"<th>{_html(cell)}</th>" for cell in head)
        body = "".join(f"<tr>{''.join(f'<td>{_html(cell)}</td>' for cell in row)}</tr>" for row in rows)
        return (
            f"<table><caption>{_html(self.summary())}</caption><thead><tr>{cells}</tr></thead>"
            f"<tbody>{body}</tbody></table>"
        )

    def table(self) -> Table:
        """The first rows as a table of 80 columns."""
        head, *rows = self._cells()
        table = Table(
            title=Text(self.summary()), title_justify="left", width=_WIDTH, box=None, pad_edge=False
        )
        for name in head:
            right = name in ("probability", "exit", "M MACs")
            table.add_column(
                name, justify="right" if right else "left", no_wrap=True, overflow="ellipsis",
                ratio=None if right else 1,
            )  # fmt: skip
        for row in rows:
            table.add_row(*map(plain, row))
        return table

    def _cells(self) -> Iterator[tuple[str, ...]]:
        """Head and rows of the table."""
        yield ("id", "class", "probability", "exit", "M MACs")
        for row in self[:_SHOWN_ROWS]:
            exit_stage = "" if row.exit_stage is None else str(row.exit_stage)
            cost = "" if row.cost_macs is None else f"{row.cost_macs / 1e6:.2f}"
            if row.error is not None:
                yield (row.id, f"error: {row.error}", "", exit_stage, cost)
            else:
                yield (row.id, row.class_name or str(row.label), f"{row.probability:.1%}", exit_stage, cost)
        if len(self) > _SHOWN_ROWS:
            yield ("…", f"{len(self) - _SHOWN_ROWS:,} more", "", "", "")

    def summary(self) -> str:
        """Number of predictions and errors, exit shares and mean cost, in a line."""
        errors = f", {len(self.errors):,} with an error" if self.errors else ""
        ran = self.exit_stage[self.exit_stage >= 0]
        if not len(ran):
            return f"{len(self):,} predictions{errors}"
        shares = " / ".join(f"{share:.0%}" for share in np.bincount(ran) / len(ran))
        cost = self.cost_macs.sum() / len(ran) / 1e6
        return f"{len(self):,} predictions{errors}; exits {shares}; {cost:.2f} M MACs on average"


_ARRAYS = ("label", "probability", "exit_stage", "cost_macs", "top_labels", "top_probabilities")


def _top(probs: Column, k: int) -> Column:
    """(N, k) classes of the highest probabilities, ties in order of the label."""
    return np.argsort(-probs, axis=1, kind="stable")[:, :k] if k else np.empty((len(probs), 0), np.int64)


def _spread(values: Column, readable: Column, fill: float) -> Column:
    """The values at the readable positions, and ``fill`` elsewhere."""
    column = np.full((len(readable), *values.shape[1:]), fill, values.dtype)
    column[readable] = values
    return column


def _html(text: str) -> str:
    """Text for an HTML cell, in a line."""
    import html

    return html.escape(str(plain(text)))
