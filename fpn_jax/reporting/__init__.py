"""From the folders of an ablation sweep to one page: read, compare, draw, write. NumPy and matplotlib only.

collect ──► sections, comparison, details ──► page
the files   what the page says, by way of     Markdown, HTML, text
            statistics, tables, plots
"""
