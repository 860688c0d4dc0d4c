"""One HTML page about one run or several, in a file that needs nothing else.

from trainer.report import read_run, write_page

write_page([read_run(Path("runs/first"))], Path("report.html"))
"""

from trainer.report.page import write_page
from trainer.report.runs import Run, is_run, read_run

__all__ = ["Run", "is_run", "read_run", "write_page"]
