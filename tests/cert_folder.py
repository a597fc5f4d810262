"""A small, valid r4.2 folder with invented rows, written by hand: for tests of the loader.

Twelve rows or more in each log, three accounts, one insider of each scenario. Nothing in it is
taken from the real release.
"""

from pathlib import Path

LOGS = ("logon", "device", "file", "email", "http")
USERS = ("AAA0001", "BBB0002", "CCC0013")
NAMES = ("Ada Alma Abel", "Bert Ben Bird", "Cora Cleo Cole")
HEADERS = {
    "logon": "id,date,user,pc,activity",
    "device": "id,date,user,pc,activity",
    "file": "id,date,user,pc,filename,content",
    "email": "id,date,user,pc,to,cc,bcc,from,size,attachments,content",
    "http": "id,date,user,pc,url,content",
    "psychometric": "employee_name,user_id,O,C,E,A,N",
    "ldap": "employee_name,user_id,email,role,business_unit,functional_unit,department,team,"
    "supervisor",
    "insiders": "dataset,scenario,details,user,start,end",
}


def event_id(log: str, number: int) -> str:
    """Return the id of one invented event.

    >>> event_id("http", 7)
    '{H7T1-A1BC22DE-0007WXYZ}'
    """
    return f"{{{log[0].upper()}7{log[1].upper()}1-A1BC22DE-{number:04d}WXYZ}}"


def stem(log: str, number: int, *, day: int | None = None, user: int | None = None) -> str:
    """Return the first four columns of an event: every event a minute later than the one before."""
    user = number % 3 if user is None else user
    day = number // 3 % 9 + 1 if day is None else day
    return (
        f"{event_id(log, number)},03/{day:02d}/2010 {8 + number // 60:02d}:{number % 60:02d}:00,"
        f"{USERS[user]},PC-{user + 1:04d}"
    )


def log_lines(log: str, rows: int) -> list[str]:
    """Return `rows` valid lines of a log, without the header."""
    lines = []
    for number in range(rows):
        user = number % 3
        tail = {
            "logon": "Logon" if number % 2 == 0 else "Logoff",
            "device": "Connect" if number % 2 == 0 else "Disconnect",
            "file": f"F{number:07d}.{('doc', 'EXE', 'zip')[user]},D0-CF-11-E0 some plain words",
            "email": (
                f"Bert.Ben.Bird@dtaa.com;Zoe{number}@hp.com,"
                f"{'Cora.Cleo.Cole@dtaa.com' if number % 2 else ''},,Ada.A@comcast.net,"
                f"{20_000 + number},{number % 3},short words"
            ),
            "http": (
                "http://example.org/Some_Topic/word/arjf12.html",
                "http://boeing.com/WboUhagvat77.htm",
                "http://www.facebook.com/Other_Topic/word/sevraqf3.php",
            )[user]
            + ",few words",
        }[log]
        lines.append(f"{stem(log, number)},{tail}")
    return lines


def write_lines(path: Path, header: str | None, lines: list[str]) -> Path:
    """Write a CSV file with line feeds, and its header if there is one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(f"{line}\n" for line in ([header] if header else []) + lines)
    path.write_bytes(text.encode())
    return path


def write_folder(
    folder: Path, *, rows: int = 120, answers: bool = True, logs: tuple[str, ...] = LOGS
) -> Path:
    """Write the file set into `folder` and return it; answers lie inside it."""
    for log in logs:
        write_lines(folder / f"{log}.csv", HEADERS[log], log_lines(log, rows))
    people = list(zip(NAMES, USERS, strict=True))
    ldap = [
        f"{name},{user},{name.replace(' ', '.')}@dtaa.com,Salesman,1,5 - Sales,,"
        f"{'' if user == 'AAA0001' else '2 - Team'},Ada Alma Abel"
        for name, user in people
    ]
    write_lines(folder / "LDAP" / "2010-02.csv", HEADERS["ldap"], ldap)
    write_lines(folder / "LDAP" / "2010-03.csv", HEADERS["ldap"], ldap[:2])
    scores = [f"{name},{user},40,39,36,19,4{i}" for i, (name, user) in enumerate(people)]
    write_lines(folder / "psychometric.csv", HEADERS["psychometric"], scores)
    if answers:
        write_answers(folder / "answers")
    return folder


def write_answers(folder: Path) -> None:
    """Write an answer key: one insider a scenario; the third also acts on AAA0001's account."""
    write_lines(
        folder / "insiders.csv",
        HEADERS["insiders"],
        [
            "2,1,r2.csv,AAA0001,1/4/2010 8:47:00,1/4/2010 8:47:00",
            "4.2,1,r4.2-1-AAA0001.csv,AAA0001,03/01/2010 08:00:00,03/02/2010 09:00:00",
            "4.2,2,r4.2-2-BBB0002.csv,BBB0002,03/01/2010 08:00:00,03/02/2010 09:00:00",
            "4.2,3,r4.2-3-CCC0013.csv,CCC0013,03/01/2010 08:00:00,03/02/2010 09:00:00",
            "6.2,3,r6.2-3.csv,CCC0013,/21/2011 11:43:39,8/21/2011 11:43:39",
        ],
    )
    logon, device, http = (log_lines(log, 12) for log in ("logon", "device", "http"))
    write_lines(
        folder / "r4.2-1" / "r4.2-1-AAA0001.csv",
        None,
        [f"logon,{logon[0]}", f"device,{device[0]}", f"device,{device[3]}", f"http,{http[0]}"],
    )
    write_lines(folder / "r4.2-2" / "r4.2-2-BBB0002.csv", None, [f"http,{http[1]}"])
    write_lines(
        folder / "r4.2-3" / "r4.2-3-CCC0013.csv", None, [f"logon,{logon[2]}", f"http,{http[6]}"]
    )
