"""A database that reads the whole query beside each delta, in the same transaction."""

from __future__ import annotations

from typing import Any

from cacheservice.cache.rows import RowsBuilder
from cacheservice.sources.base import ReadPlan, ReadResult
from cacheservice.sources.postgres.database import Database
from cacheservice.sources.postgres.reading import DatasetReader
from cacheservice.sources.postgres.transaction import Transaction
from tests.kit.datasets import Table, rows_builder, table_of
from tests.kit.readings import because_of, kind_of


class Compared(Database):
    """Reads the whole query as well in the transaction of each delta."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.whole: dict[str, tuple[str, Table]] = {}
        self.kinds: list[str] = []
        self.reasons: set[str] = set()
        self._reader = _ReadsAllToo(self, self._transactions, self._reader._fetching, self.capturing)

    @property
    def changing(self) -> list[str]:
        """The kinds of reads, without those that only a late notification caused."""
        return [kind for kind in self.kinds if kind != "unchanged"]


class _ReadsAllToo(DatasetReader):
    def __init__(self, database: Compared, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._database = database

    async def read(self, transaction: Transaction, read: ReadPlan, builder: RowsBuilder) -> ReadResult:
        result = await super().read(transaction, read, builder)
        self._database.kinds.append(kind_of(result))
        if because := because_of(result):
            self._database.reasons.add(because)
        again = rows_builder()
        await self._fetching.all_rows(transaction, ReadPlan(read.dataset, lambda: again), again)
        moment = result.moment.database_snapshot
        self._database.whole[read.dataset.name] = (moment, table_of(again.finish()))
        return result
