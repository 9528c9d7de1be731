"""A rendered document as an answer, which is let go piece by piece as it is written.

aiohttp keeps a response for as long as its connection waits for the next request, and asyncio (3.12 and later) keeps
all of what it was given until its last byte is sent. So whoever scraped and stayed connected, or read all but the end,
would hold a document of its own: 500 of them 525 MB.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from aiohttp import web

from exporter.prometheus.exposition import cut_pieces


class Document(web.StreamResponse):
    """An answer whose body is written by ``write_to`` and is gone then."""

    def __init__(self, parts: Sequence[bytes], headers: Mapping[str, str]) -> None:
        """``parts`` are those of the body, of any length."""
        super().__init__(headers=headers)
        self._document = parts
        self.content_length = sum(map(len, parts))

    @property
    def document_id(self) -> int:
        """The same for all answers that hold one and the same document."""
        return id(self._document)

    async def write_to(self, request: web.Request) -> None:
        """Write everything, as fast as the client reads."""
        await self.prepare(request)
        # Not kept by whoever called us, whatever happens: this frame ends.
        parts, self._document = self._document, ()
        if request.method != "HEAD":
            for piece in cut_pieces(parts):
                await self.write(piece)
        await self.write_eof()
