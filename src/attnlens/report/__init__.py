"""The report: every measurement of a study joined into one table, its figures and one page that opens offline."""
