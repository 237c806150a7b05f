"""The live service: text that grows goes in, text that stays comes out; and its clients."""
