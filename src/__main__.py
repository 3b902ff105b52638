"""``python -m src`` lists what can be done."""

VERBS = {
    "prepare": "check a data set, fetch weights",
    "train": "train an autoencoder or a diffusion model; the same command resumes",
    "encode": "encode a data set once, for the training of a diffusion model",
    "average": "make another moving average of a run's weights, after training",
    "sample": "make videos with a trained model",
    "evaluate": "measure a model, or a folder of videos, against real ones",
    "convert": "turn checkpoints of the released LVDM code into model folders, and back",
    "report": "write a page about some runs",
}


def main() -> None:
    """Prints the verbs."""
    print(
        "usage: python -m PACKAGE.VERB [group=option] [key=value] …   (--help says more)\n".replace(
            "PACKAGE", str(__package__)
        )
    )
    for name, purpose in VERBS.items():
        print(f"  {name:9} {purpose}")


if __name__ == "__main__":
    main()
