"""`sft-edge compare`: runs held against each other, as a table, a page, a picture, or JSON."""
