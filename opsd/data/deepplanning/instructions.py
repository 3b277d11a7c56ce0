"""What a student is told before a travel task: how to look things up, how a plan is written, and what it is held to.

Ours in every word, and one text for both languages: names stay as the database has them. The public instructions say
more of the same; figures of models that read another text are not to be compared.
"""

INSTRUCTIONS = """\
You plan a journey. First look up what you need with the tools; then write one plan and nothing after it. The request \
is complete: ask nothing back. Whatever you name (stations, hotels, attractions, restaurants, times, prices) must come \
from a tool's answer, letter for letter and in its language; invent nothing.

The plan stands between <plan> and </plan>. Each day has a head and then a line per activity, in order of time:

Day 1:
Current City: from A to B
Accommodation: HOTEL, ¥300/room/night
HH:MM-HH:MM | travel_intercity_public | train NUMBER, DEPARTURE STATION - ARRIVAL STATION, ¥100/person
HH:MM-HH:MM | travel_city | FROM - TO, 5km, 20min, ¥30
HH:MM-HH:MM | hotel | Check-in, HOTEL
HH:MM-HH:MM | meal | Lunch, RESTAURANT, ¥80/person
HH:MM-HH:MM | attraction | ATTRACTION, ¥60/person
HH:MM-HH:MM | buffer | WHAT FOR

There are no other kinds of lines. A ride between cities begins with train or flight. A day that stays in one city has \
"Current City: B". The last day has "Accommodation: -". Midnight at a day's end is 24:00. A buffer is time that passes \
in one place: before and after trains and flights, or a rest. After the last day:

**Budget Summary**:
Transportation: 0 RMB
Accommodation: 0 RMB
Meals: 0 RMB
Attractions & Tickets: 0 RMB
Total Estimated Budget: 0 RMB
</plan>

The plan is held to this:
1. As many days as asked for; the first leaves home, the last returns there; every change of city is a train or flight \
of the tools, at its own times and price per person.
2. Every name is in the tools' answers, with its price: hotels per room and night, meals and tickets per person, a \
taxi per car of four.
3. Every day but the last ends at the hotel that its head names. Between two places there is a travel_city line that \
takes what query_road_route_info says, within five minutes.
4. Lines follow each other without gaps or overlaps.
5. A day in one city has lunch and dinner, at least two hours apart, and two attractions, or four hours of them. On a \
day of arrival: before 10:00 two meals; 10:00 to 15:00 one or two; later at most one; before 12:00 an attraction too. \
On a day of departure: before 9:00 no meal; 9:00 to 15:00 at most one; later at least one; after 16:00 an attraction \
too. Breakfast is not planned.
6. Meals take an hour to two, attractions between their min_visit_hours and max_visit_hours, each within its opening \
hours and not on a closing day.
7. No restaurant and no attraction twice.
8. The total is the sum of all prices: per person times the travellers, per room times rooms and nights, per car times \
cars. It keeps within the budget where the request has one.
9. What the request asks for by name or by property (the cheapest, the best rated, a service, a type) is in the plan: \
compare what the tools return, and take exactly that."""
