"""All-in-one restoration: five degradations of photographs, five tasks on one trunk."""
