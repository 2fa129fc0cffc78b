"""The report of a study: one HTML page that needs no network, and its tables and figures as files.

source.py     what a study directory holds
words.py      what the data support, and what they do not, in sentences
measured.py   how far methods co-adapt and over-fit
budgets.py    whether the runs had equal budgets
tables.py     tables for the page, as CSV and as LaTeX
figures.py    figures for the page, as SVG and as PNG
sweeps.py     methods that differ in one number
panels.py     what the methods predict for a few test cases
page.py       puts them together: template.html, page.css, page.js
"""

from medseg_reg.study.report.page import write_report

__all__ = ["write_report"]
