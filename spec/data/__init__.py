"""The one reader of what people bring: prompts, conversations and texts, in whatever file or data set they are.

content    the bytes of a file: unpacked, and what kind of content they are
sources    files and data sets as a row of entries
forms      what an entry says: a `Record`
reading    all or some of a source, with account of what was left out
"""
