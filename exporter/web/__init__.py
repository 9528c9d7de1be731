"""HTTP: handlers, connections, and who may see what; the only user of aiohttp."""
