"""Worker processes: the user's code in processes that can be killed, under deadlines and limits of memory."""
