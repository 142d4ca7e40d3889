"""The page in the browser, one file per page.

`page` puts the pages together and listens; `generate_page` is what is seen and pressed; `studio` is what the server process keeps
between two presses: one loaded base, one lock that owns it, and where LoRA files and pictures lie.
"""
