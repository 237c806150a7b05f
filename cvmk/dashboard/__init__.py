"""The live page over the events of runs: `cvmk dashboard RUN...`.

Reads the runs' logs as they grow, keeps their numbers in bounded memory (`numbers`, `run`), and answers a page on this machine with what a window of
its charts shows (`board`, `app`). It reads nothing but events, and writes nothing.
"""
