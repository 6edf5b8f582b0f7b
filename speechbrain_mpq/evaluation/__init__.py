"""Scores of waveforms and words: SI-SNR, PESQ, word errors and their
significance, the results table and the report page.

Nothing here knows how a signal was made: functions take waveforms, words,
plain dicts and files. Import what is needed from the files themselves.
"""
