"""From run folders to a table in the terminal and a page that explains itself; reads files only."""

from simba_lab.report.html import write_report
from simba_lab.report.results import load_results
from simba_lab.report.table import print_table, terminal_table

__all__ = ["load_results", "print_table", "terminal_table", "write_report"]
