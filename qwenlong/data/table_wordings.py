"""Wordings of the table questions: several for each template of ``table_templates``."""

WORDINGS: dict[str, tuple[str, ...]] = {
    "total": (
        "What is the total {label} of the {universe}?",
        "Add up the {label} of all {universe}. What is the sum?",
        "Summed over the {universe}, what does the {label} come to?",
        "What does the {label} amount to if all {universe} are taken together?",
    ),
    "mean": (
        "What is the average {label} of the {universe}?",
        "Take the mean of the {label} over all {universe}. What is it?",
        "How large is the {label} on average over the {universe}?",
    ),
    "mean_of_category": (
        "What is the average {label} of those {universe} whose {kind}?",
        "Look only at the {universe} whose {kind}. What is their mean {label}?",
        "Among the {universe}, keep those whose {kind}. How large is the {label} on average?",
    ),
    "count_above": (
        "How many of the {universe} have a value of {label} {word} {amount}?",
        "Count the {universe} whose {label} is {word} {amount}. How many are there?",
        "For how many of the {universe} is the {label} {word} {amount}?",
    ),
    "count_category": (
        "How many of the {universe} have the {kind}?",
        "Count the {universe} with the {kind}. How many are there?",
        "Among the {universe}, how often does the {kind} occur?",
    ),
    "extreme": (
        "What is the {word} {label} among the {universe}?",
        "Find the {word} value of {label} among all {universe}. What is it?",
        "Of all {universe}, how large is the {word} {label}?",
    ),
    "count_distinct": (
        "How many different values of {category} occur among the {universe}?",
        "Count each {category} once: how many of them do the {universe} have?",
        "Over the {universe}, how many distinct values does the column {category} take?",
    ),
    "group_difference": (
        "By how much does the {word} {label} of the {entities} {more} exceed that of those {less}?",
        "Compare the {word} {label} of the {entities} {more} with that of those {less}. How "
        "large is the difference?",
        "How much higher is the {word} {label} of the {entities} {more} than of those {less}?",
    ),
    "group_ratio": (
        "How many times as large as the {word} {label} of the {entities} {less} is that of "
        "those {more}?",
        "Divide the {word} {label} of the {entities} {more} by that of those {less}. What is "
        "the ratio?",
        "What is the ratio of the {word} {label} of the {entities} {more} to that of those {less}?",
    ),
    "share_of_part": (
        "What percentage of the total {label} of the {universe} falls to those {place}?",
        "Of the {label} of all {universe}, added up, how many percent belong to the "
        "{entities} {place}?",
        "Which share, in percent, do the {entities} {place} have in the total {label} of the "
        "{universe}?",
    ),
    "quotient_of_totals": (
        "Divide the total {above} of the {universe} by their total {below}. What is the result?",
        "Taken together, what {above} per unit of {below} do the {universe} have?",
        "What is the ratio of the total {above} to the total {below} of the {universe}?",
    ),
    "value_range": (
        "What is the difference between the highest and the lowest {label} among the {universe}?",
        "How far apart are the largest and the smallest value of {label} among the {universe}?",
        "Over the {universe}, what range (highest minus lowest) does the {label} span?",
    ),
    "share_above": (
        "What percentage of the {universe} have a value of {label} above {amount}?",
        "How many percent of the {universe} are above {amount} in {label}?",
        "Which share of the {universe}, in percent, exceeds a {label} of {amount}?",
    ),
    "category_difference": (
        "Among the {universe}, by how much is the average {label} of those whose {kind} "
        "{more} above that of those whose {kind} {less}?",
        "Take the {universe} whose {kind} {more}, and those whose {kind} {less}. How large is"
        " the difference of their average {label}?",
        "Over the {universe}, how much higher is the mean {label} where the {kind} {more} "
        "than where it is {less}?",
    ),
    "change_between_periods": (
        "By how many percent did the average {label} of the {entities}{kind} change between "
        "those {early} and those {late}?",
        "Compare the {entities}{kind} {late} with those {early}: what is the percentage "
        "change of the average {label} from the earlier to the later group?",
        "What is the growth, in percent, of the mean {label} from the {entities}{kind} "
        "{early} to those {late}?",
    ),
    "difference_between_periods": (
        "Subtract the average {label} of the {entities} {early} from that of those {late}. "
        "What remains?",
        "How much did the average {label} of the {entities} rise from those {early} to those "
        "{late}?",
        "What is the change of the mean {label} from the {entities} {early} to those {late}?",
    ),
    "peak_period": (
        "Go through the {entities} {span}. In which {unit} was their {word} {label} "
        "{extreme_word}?",
        "Of the {entities} {span}, which {unit} had the {extreme_word} {word} {label}?",
        "Over the time {span}, find the {unit} in which the {word} {label} of the {entities} "
        "was {extreme_word}. Which is it?",
    ),
    "count_rises": (
        "Take the {word} {label} of the {entities} for each {unit} of {names}, in this order."
        " How often is it higher than the one before it in the list?",
        "Put the {unit} values {names} in this order, with the {word} {label} of the "
        "{entities} of each. How many times does the figure rise from one to the next?",
        "Going through {names} in this order, in how many steps does the {word} {label} of "
        "the {entities} increase?",
    ),
    "largest_step": (
        "Take the {word} {label} of the {entities} for each {unit} of {names}, in this order."
        " How large is the largest rise from one to the next?",
        "Going through {names} in this order, by how much does the {word} {label} of the "
        "{entities} increase at most from one to the next?",
        "For {names}, in this order, compute the {word} {label} of the {entities}. What is "
        "the greatest increase between two neighbours?",
    ),
    "change_of_period_column": (
        "By how many percent did the average {label} of the {universe} change from {old} to {new}?",
        "What is the growth, in percent, of the mean {label} of the {universe} between {old} "
        "and {new}?",
        "Compare {new} with {old}: how large is the percentage change of the average {label} "
        "of the {universe}?",
    ),
    "kth_name": (
        "Which of the {universe} has the {word} {label}? Give its {name}.",
        "Order the {universe} by {label}. What is the {name} of the one with the {word} value?",
        "Give the {name} of the one with the {word} {label} among all {universe}.",
    ),
    "kth_name_of_category": (
        "Among the {universe}, look at those whose {kind}. Which has the {word} {label}? Give"
        " its {name}.",
        "Give the {name} of the one with the {word} {label} among those {universe} whose {kind}.",
        "Order the {universe} whose {kind} by {label}. What is the {name} of the one with the"
        " {word} value?",
    ),
    "position_of_name": (
        "Order the {universe} by {label} from the highest to the lowest. At which position, "
        "counted from one, does {shown} stand?",
        "Ranked by {label}, highest first, which rank does {shown} have among the {universe}?",
        "If the {universe} are sorted by falling {label}, what is the position of {shown} in "
        "the list?",
    ),
    "best_category": (
        "Group the {universe} by {kind}. Which {kind} has the {word} average {label}?",
        "For which {kind} is the mean {label} of the {universe} the {word}?",
        "Compute the average {label} of the {universe} for each {kind}. Which {kind} comes "
        "out {word}?",
    ),
    "kth_value": (
        "What is the {word} {label} among the {universe}, equal values counted one by one?",
        "Sort the {universe} by {label}, equal values counted one by one. What is the {word} "
        "value?",
        "Equal values counted one by one, how large is the {word} {label} of all {universe}?",
    ),
    "mean_of_top": (
        "What is the average of the {n} {word} values of {label} among the {universe}?",
        "Take the {n} {word} values of {label} among all {universe}. What is their mean?",
        "Average the {n} {word} values of {label} that occur among the {universe}. What comes out?",
    ),
    "mean_in_best_part": (
        "Consider the {entities} of each {unit}: {names}. Find the {unit} with the {word} "
        "average {first}. What is the average {second} there?",
        "Of {names}, one {unit} has {entities} with the {word} mean {first}. How large is the"
        " mean {second} in that {unit}?",
        "Compute the average {first} of the {entities} for {names}, separately. For the "
        "{unit} where it is {word}, give the average {second}.",
    ),
    "name_in_best_part": (
        "Consider the {entities} of each {unit}: {names}. Find the {unit} with the {word} "
        "average {first}. Which of its entries has the highest {second}? Give its {name}.",
        "Of {names}, take the {unit} whose {entities} have the {word} mean {first}. Give the "
        "{name} of the one with the highest {second} in it.",
        "Compute the average {first} of the {entities} for {names}, separately. In the {unit}"
        " where it is {word}, which {name} has the highest {second}?",
    ),
    "count_above_mean": (
        "How many of the {universe} are {word} the average {label} of all of them?",
        "Compute the mean {label} of the {universe}. How many of them lie {word} it?",
        "Count those {universe} whose {label} is {word} the average {label} of these {universe}.",
    ),
    "mean_above_mean": (
        "Keep those {universe} whose {first} is above the average {first} of all of them. "
        "What is the average {second} of those kept?",
        "Compute the mean {first} of the {universe}. What is the mean {second} of those above it?",
        "Among the {universe}, take the ones with more than the average {first}. How large is"
        " their {second} on average?",
    ),
    "value_of_kth": (
        "Find the one with the {word} {first} among the {universe}. What is its {second}?",
        "What {second} does the one with the {word} {first} of all {universe} have?",
        "Order the {universe} by {first} and take the one with the {word} value. How large is"
        " its {second}?",
    ),
    "mean_without_top": (
        "Leave out the {n} highest values of {label} among the {universe}. What is the "
        "average of the rest?",
        "Without the {n} highest values of {label}, what is the mean {label} of the {universe}?",
        "Sort the {universe} by {label}, drop the {n} highest and average the others. What "
        "comes out?",
    ),
    "mean_of_largest_category": (
        "Which {kind} is the most frequent among the {universe}? Give the average {label} of "
        "the entries that have it.",
        "Find the {kind} that most of the {universe} have. What is the mean {label} of those "
        "with it?",
        "Group the {universe} by {kind} and take the largest group. How large is its average "
        "{label}?",
    ),
}
