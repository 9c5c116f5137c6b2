"""Steps without training that bring outputs closer to float, and what each choice costs there. Above network."""
