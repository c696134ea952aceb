"""The compiler: one pass per file. Installs as `lora_fx.passes`."""

if __name__ != "lora_fx.passes":
    raise ImportError(f"{__name__!r} is not a package of its own: import lora_fx.passes")
