"""Score systems and show the results: measures, significance, table, report.

Nothing here knows how a signal was made: functions take waveforms, words,
plain dicts and files. A `task.Task` says what is scored. Import what is needed
from the files themselves.
"""
