"""One module per revision of the tables; a revision that was released is never changed."""
