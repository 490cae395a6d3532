"""State of one run below the strategies: frames, records, enumeration, and facts about distributions."""
