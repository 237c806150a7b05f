"""What every page of cvmk stands on: files with headers that keep strangers out, their common look (`shared/`), a listening socket, uvicorn in an event loop.

Needs starlette and uvicorn (extra `serve`).
"""
