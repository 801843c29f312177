"""What a report says: facts from receipts and the files that stages wrote, their figures, a model card."""
