package sql

import (
	"errors"
	"strings"
	"testing"

	"kalium.dev/kalium/runtime/internal/policy"
	"kalium.dev/kalium/runtime/internal/wire"
)

const testSchema = "helloRetail"

func TestAStatementIsItsVerbAndItsTables(t *testing.T) {
	for _, c := range []struct{ statement, text string }{
		{"SELECT rowvalues FROM photoAssignmentTable WHERE rowkey = '200494'", "mysql select read photoAssignmentTable"},
		{"select * from t;", "mysql select read t"},
		{"SELECT 1", "mysql select"},
		{"SELECT 1 FROM DUAL", "mysql select"},
		{"SELECT DISTINCT a.x, b.* FROM `a` a JOIN b ON a.id = b.id LEFT JOIN c USING (id), d NATURAL JOIN e", "mysql select read a,b,c,d,e"},
		{"SELECT * FROM a STRAIGHT_JOIN b ON a.x=b.x RIGHT OUTER JOIN c ON 1 CROSS JOIN d", "mysql select read a,b,c,d"},
		{"SELECT * FROM (a, b) JOIN (c JOIN d ON 1) ON 1", "mysql select read a,b,c,d"},
		{"SELECT * FROM helloRetail.t", "mysql select read t"},
		{"SELECT * FROM `helloRetail`.`t`, mysql.user, information_schema . tables", "mysql select read information_schema.tables,mysql.user,t"},
		{"SELECT (SELECT max(x) FROM b) FROM a WHERE EXISTS (SELECT 1 FROM c) AND y IN (SELECT z FROM d) AND y > ALL (SELECT z FROM e)", "mysql select read a,b,c,d,e"},
		{"SELECT * FROM (SELECT x FROM inner1 WHERE y) AS q JOIN t ON q.x = t.x", "mysql select read inner1,t"},
		{"SELECT a FROM t UNION ALL SELECT b FROM u UNION (SELECT c FROM v ORDER BY 1 LIMIT 2) ORDER BY 1 LIMIT 5", "mysql select read t,u,v"},
		{"(SELECT a FROM t)", "mysql select read t"},
		{"SELECT a FROM t ORDER BY (SELECT b FROM u)", "mysql select read t,u"},
		{"SELECT a FROM t GROUP BY a HAVING COUNT(*) > 1 ORDER BY a DESC LIMIT 1, 2", "mysql select read t"},
		{"SELECT a FROM t LIMIT 1 OFFSET 2 FOR UPDATE SKIP LOCKED", "mysql select read t"},
		{"SELECT a FROM t LOCK IN SHARE MODE", "mysql select read t"},
		{"SELECT CASE a WHEN 1 THEN (SELECT x FROM u) ELSE 2 END AS 'label' FROM t", "mysql select read t,u"},
		{"SELECT CAST(a AS CHAR(10) CHARACTER SET utf8mb4), CONVERT(a USING latin1), CONVERT(a, SIGNED INTEGER) FROM t", "mysql select read t"},
		{"SELECT EXTRACT(YEAR FROM d), TRIM(LEADING 'x' FROM y), TRIM(BOTH FROM y), SUBSTRING(y FROM 2 FOR 3) FROM t", "mysql select read t"},
		{"SELECT GROUP_CONCAT(DISTINCT a ORDER BY b DESC SEPARATOR ', ') FROM t", "mysql select read t"},
		{"SELECT d + INTERVAL 1 DAY, DATE_ADD(d, INTERVAL -1 DAY_HOUR), DATE '2020-01-01' FROM t", "mysql select read t"},
		{"SELECT a FROM t WHERE NOT a IS NOT NULL AND b NOT BETWEEN 1 AND 2 AND c NOT LIKE 'x%' ESCAPE '!' AND d <=> NULL OR !e XOR f REGEXP 'x'", "mysql select read t"},
		{"SELECT a->>'$.b' FROM t WHERE (a, b) IN ((1, 2), (3, 4)) AND c COLLATE utf8mb4_bin = 'x' 'y'", "mysql select read t"},
		{"SELECT x'41', X'', b'01', N'text', _utf8mb4'text', _binary 'b', 0x41, 1.5e-3, .5 FROM t", "mysql select read t"},
		{"SELECT 'it''s; \\' DROP TABLE x', \"FROM y\" /* FROM z */ FROM t -- JOIN u\n# JOIN v\nWHERE 1", "mysql select read t"},
		{"SELECT 'gr\xc3\xbc\xc3\x9fe\xbf\x5c\x27' FROM t", "mysql select read t"},
		{"SELECT t.select, t.`from` FROM t", "mysql select read t"},
		{"SELECT SQL_NO_CACHE NOW(), CURRENT_TIMESTAMP, LAST_INSERT_ID(), VERSION()", "mysql select"},
		{"INSERT INTO storedPhotosTable (rowkey, rowvalues) VALUES ('k', '{\\\"a\\\": 1}')", "mysql insert write storedPhotosTable"},
		{"INSERT t VALUES (1, DEFAULT, NULL), (-2, NOW(), _binary'\\0')", "mysql insert write t"},
		{"INSERT INTO t () VALUES ()", "mysql insert write t"},
		{"INSERT IGNORE INTO t SET a = 1, t.b = (SELECT x FROM u)", "mysql insert read u write t"},
		{"INSERT INTO t (a) SELECT a FROM u WHERE b", "mysql insert read u write t"},
		{"INSERT INTO t SELECT * FROM t", "mysql insert read t write t"},
		{"INSERT INTO t (a) VALUES (1) ON DUPLICATE KEY UPDATE a = VALUES(a) + 1, b = (SELECT 1 FROM w)", "mysql insert read w write t"},
		{"REPLACE INTO other.t VALUES (1)", "mysql replace write other.t"},
		{"UPDATE t SET a = a + 1, t.b = 'x' WHERE c = 1 ORDER BY d LIMIT 1", "mysql update write t"},
		{"UPDATE t AS q SET q.a = 1", "mysql update write t"},
		{"UPDATE t SET a = (SELECT b FROM u) WHERE c IN (SELECT d FROM v)", "mysql update read u,v write t"},
		{"UPDATE t a JOIN u b ON a.x = b.x SET a.y = b.y", "mysql update read u write t"},
		{"UPDATE t, u SET t.a = 1, u.b = 2", "mysql update write t,u"},
		{"DELETE FROM storedPhotosTable WHERE rowkey = 'k'", "mysql delete write storedPhotosTable"},
		{"DELETE QUICK FROM t AS q ORDER BY a LIMIT 3", "mysql delete write t"},
		{"DELETE FROM other.t WHERE a IN (SELECT b FROM u)", "mysql delete read u write other.t"},
		{"DELETE FROM helloRetail.t", "mysql delete write t"},
		{"UPDATE t JOIN (SELECT x FROM u) q ON t.x = q.x SET t.a = q.x", "mysql update read u write t"},
		{"DELETE a FROM t AS a JOIN u ON a.x = u.x", "mysql delete read u write t"},
		{"DELETE t.*, u FROM t, u, v", "mysql delete read v write t,u"},
		{"DELETE FROM a, b USING t AS a, u AS b, v", "mysql delete read v write t,u"},
		{"SHOW TABLES", "mysql show-tables"},
		{"show tables like 'photoAssignmentTable'", "mysql show-tables"},
		{"START TRANSACTION", "mysql begin"},
		{"START TRANSACTION READ ONLY", "mysql begin"},
		{"START TRANSACTION WITH CONSISTENT SNAPSHOT", "mysql begin"},
		{"BEGIN", "mysql begin"},
		{"begin work;", "mysql begin"},
		{"COMMIT", "mysql commit"},
		{"ROLLBACK WORK", "mysql rollback"},
		{"CREATE TABLE IF NOT EXISTS `t` (`rowkey` varchar(255) NOT NULL, rowvalues LONGTEXT, label INTEGER DEFAULT -1, at TIMESTAMP DEFAULT CURRENT_TIMESTAMP ON UPDATE CURRENT_TIMESTAMP, PRIMARY KEY (rowkey), KEY k (label)) ENGINE=InnoDB DEFAULT CHARSET=utf8mb4", "mysql create-table write t"},
		{"CREATE TABLE t (rowkey VARCHAR(255) PRIMARY KEY, rowvalues LONGTEXT)", "mysql create-table write t"},
		{"SET NAMES utf8mb4", "mysql set names utf8mb4"},
		{"SET NAMES 'utf8mb4' COLLATE 'utf8mb4_general_ci'", "mysql set names utf8mb4"},
		{"set names binary", "mysql set names binary"},
		{"SET AUTOCOMMIT = 0", "mysql set autocommit"},
		{"SET autocommit=1", "mysql set autocommit"},
	} {
		got, err := Classify([]byte(c.statement), testSchema)
		if err != nil {
			t.Errorf("%s\n got refusal %v\nwant %s", c.statement, err, c.text)
			continue
		}
		if got.Text != c.text || got.Support != strings.HasPrefix(c.text, "mysql set") {
			t.Errorf("%s\n got %s (support %v)\nwant %s", c.statement, got.Text, got.Support, c.text)
		}
	}
}

func TestAStatementThatIsNotUnderstoodIsRefused(t *testing.T) {
	for _, c := range []struct {
		statement string
		reason    policy.Reason
	}{
		{"", policy.ReasonMalformed},
		{";", policy.ReasonUnsupported},
		{"SELECT 1; DROP TABLE t", policy.ReasonUnsupported},
		{"SELECT 1;;", policy.ReasonUnsupported},
		{"SELECT /*!50000 1 */ FROM t", policy.ReasonUnsupported},
		{"SELECT 1 /*! UNION SELECT * FROM mysql.user */", policy.ReasonUnsupported},
		{"SELECT 1 /*M! FROM t */", policy.ReasonUnsupported},
		{"SELECT 1 /*m!100000 FROM t */", policy.ReasonUnsupported},
		{"SELECT /*+ SET_VAR(sql_mode=ANSI_QUOTES) */ 1", policy.ReasonUnsupported},
		{"SELECT 1 /* /* */", policy.ReasonMalformed},
		{"SELECT 1 /* ", policy.ReasonMalformed},
		{"SELECT 1 --x\n FROM t", policy.ReasonMalformed},
		{"SELECT 5--3", policy.ReasonMalformed},
		{"SELECT 1 --", policy.ReasonMalformed},
		{"SELECT 1 # \x00 FROM t", policy.ReasonMalformed},
		{"SELECT 'open", policy.ReasonMalformed},
		{"SELECT 'open\\'", policy.ReasonMalformed},
		{"SELECT `open", policy.ReasonMalformed},
		{"SELECT ``", policy.ReasonMalformed},
		{"SELECT a FROM `a``b`", policy.ReasonUnsupported},
		{"SELECT a FROM `a.b`", policy.ReasonUnsupported},
		{"SELECT a FROM `a,b`", policy.ReasonUnsupported},
		{"SELECT a FROM \"t\"", policy.ReasonUnsupported},
		{"SELECT a\xa0FROM t", policy.ReasonUnsupported},
		{"SELECT 1\xa0", policy.ReasonMalformed},
		{"SELECT 1\x0bFROM t", policy.ReasonMalformed},
		{"SELECT \\N", policy.ReasonMalformed},
		{"SELECT {d '2020-01-01'}", policy.ReasonMalformed},
		{"SELECT ? FROM t", policy.ReasonMalformed},
		{"SELECT @@version", policy.ReasonUnsupported},
		{"SELECT @a := 1", policy.ReasonUnsupported},
		{"SELECT a INTO OUTFILE '/tmp/x' FROM t", policy.ReasonUnsupported},
		{"SELECT a FROM t INTO DUMPFILE '/tmp/x'", policy.ReasonUnsupported},
		{"SELECT a FROM t INTO @x", policy.ReasonUnsupported},
		{"SELECT LOAD_FILE('/etc/passwd')", policy.ReasonUnsupported},
		{"SELECT SLEEP(10)", policy.ReasonUnsupported},
		{"SELECT BENCHMARK(1000000, MD5('x'))", policy.ReasonUnsupported},
		{"SELECT GET_LOCK('x', 1)", policy.ReasonUnsupported},
		{"SELECT stored_function()", policy.ReasonUnsupported},
		{"SELECT helloRetail.f()", policy.ReasonUnsupported},
		{"SELECT `md5`('x')", policy.ReasonUnsupported},
		{"SELECT COUNT (*) FROM t", policy.ReasonUnsupported},
		{"SELECT NEXTVAL(s)", policy.ReasonUnsupported},
		{"SELECT NEXT VALUE FOR s", policy.ReasonUnsupported},
		{"SELECT a FROM t WHERE a = NEXT VALUE FOR s", policy.ReasonUnsupported},
		{"SELECT * FROM t PARTITION (p0)", policy.ReasonUnsupported},
		{"SELECT * FROM t USE INDEX (i)", policy.ReasonUnsupported},
		{"SELECT * FROM t FOR SYSTEM_TIME ALL", policy.ReasonUnsupported},
		{"SELECT * FROM JSON_TABLE('[]', '$' COLUMNS (a INT PATH '$')) j", policy.ReasonUnsupported},
		{"SELECT * FROM t PROCEDURE ANALYSE()", policy.ReasonUnsupported},
		{"SELECT (TABLE t)", policy.ReasonUnsupported},
		{"SELECT * FROM t WHERE a IN (TABLE u)", policy.ReasonUnsupported},
		{"SELECT a FROM t INTERSECT SELECT a FROM u", policy.ReasonUnsupported},
		{"SELECT ROW_NUMBER() OVER () FROM t", policy.ReasonUnsupported},
		{"SELECT _gbk'\xbf\x5c' FROM t", policy.ReasonMalformed},
		{"SELECT _gbk'x' FROM t", policy.ReasonUnsupported},
		{"SELECT x'4g'", policy.ReasonMalformed},
		{"SELECT x'4\\''", policy.ReasonMalformed},
		{"SELECT 1a FROM t", policy.ReasonMalformed},
		{"SELECT t.1a FROM t", policy.ReasonMalformed},
		{"SELECT 1e FROM t", policy.ReasonMalformed},
		{"SELECT 0X41", policy.ReasonMalformed},
		{"SELECT * + 1 FROM t", policy.ReasonMalformed},
		{"SELECT 1 + t.* FROM t", policy.ReasonMalformed},
		{"SELECT a FROM", policy.ReasonMalformed},
		{"SELECT FROM t", policy.ReasonUnsupported},
		{"WITH q AS (SELECT 1) SELECT * FROM q", policy.ReasonUnsupported},
		{"TABLE t", policy.ReasonUnsupported},
		{"VALUES ROW(1)", policy.ReasonUnsupported},
		{"INSERT INTO t VALUES (1) RETURNING a", policy.ReasonUnsupported},
		{"INSERT INTO t PARTITION (p) VALUES (1)", policy.ReasonUnsupported},
		{"REPLACE INTO t VALUES (1) ON DUPLICATE KEY UPDATE a = 1", policy.ReasonUnsupported},
		{"UPDATE t, u SET a = 1", policy.ReasonUnsupported},
		{"UPDATE t, (SELECT 1 AS x) q SET a = 1", policy.ReasonUnsupported},
		{"UPDATE t, u SET q.a = 1", policy.ReasonUnsupported},
		{"UPDATE t, T SET t.a = 1", policy.ReasonUnsupported},
		{"UPDATE (SELECT 1 AS x) q SET q.x = 1", policy.ReasonUnsupported},
		{"DELETE q FROM t", policy.ReasonUnsupported},
		{"DELETE FROM t.* WHERE 1", policy.ReasonUnsupported},
		{"UPDATE t, (SELECT 1 AS x) q SET q.x = 1", policy.ReasonUnsupported},
		{"DELETE q FROM t, (SELECT 1 AS x) q", policy.ReasonUnsupported},
		{"DELETE FROM t RETURNING *", policy.ReasonUnsupported},
		{"DELETE FROM t, u", policy.ReasonMalformed},
		{"SHOW TABLES FROM mysql", policy.ReasonUnsupported},
		{"SHOW DATABASES", policy.ReasonUnsupported},
		{"SHOW TABLES WHERE SLEEP(1)", policy.ReasonUnsupported},
		{"BEGIN NOT ATOMIC SELECT 1; END", policy.ReasonUnsupported},
		{"COMMIT AND CHAIN", policy.ReasonUnsupported},
		{"ROLLBACK TO SAVEPOINT s", policy.ReasonUnsupported},
		{"CREATE TEMPORARY TABLE t (a INT)", policy.ReasonUnsupported},
		{"CREATE OR REPLACE TABLE t (a INT)", policy.ReasonUnsupported},
		{"CREATE TABLE t LIKE u", policy.ReasonUnsupported},
		{"CREATE TABLE t (LIKE u)", policy.ReasonUnsupported},
		{"CREATE TABLE t (a INT) SELECT * FROM u", policy.ReasonUnsupported},
		{"CREATE TABLE t (a INT) AS SELECT * FROM u", policy.ReasonUnsupported},
		{"CREATE TABLE t (a INT, FOREIGN KEY (a) REFERENCES u (a))", policy.ReasonUnsupported},
		{"CREATE TABLE t (a INT REFERENCES u (a))", policy.ReasonUnsupported},
		{"CREATE TABLE t (a INT) ENGINE=FEDERATED CONNECTION='mysql://evil/x/y'", policy.ReasonUnsupported},
		{"CREATE TABLE t (a INT) DATA DIRECTORY='/tmp'", policy.ReasonUnsupported},
		{"CREATE TABLE t (a INT DEFAULT (SLEEP(1)))", policy.ReasonMalformed},
		{"CREATE FUNCTION f() RETURNS INT RETURN 1", policy.ReasonUnsupported},
		{"SET NAMES gbk", policy.ReasonUnsupported},
		{"SET NAMES utf8mb4 COLLATE latin1_bin", policy.ReasonUnsupported},
		{"SET NAMES utf8mb4, sql_mode = ''", policy.ReasonMalformed},
		{"SET sql_mode = 'ANSI_QUOTES'", policy.ReasonUnsupported},
		{"SET AUTOCOMMIT = 0, sql_mode = ''", policy.ReasonMalformed},
		{"SET AUTOCOMMIT = (SELECT 1)", policy.ReasonMalformed},
		{"SET AUTOCOMMIT = 2", policy.ReasonUnsupported},
		{"SET character_set_client = gbk", policy.ReasonUnsupported},
		{"USE mysql", policy.ReasonUnsupported},
		{"CALL p()", policy.ReasonUnsupported},
		{"DO SLEEP(1)", policy.ReasonUnsupported},
		{"HANDLER t OPEN", policy.ReasonUnsupported},
		{"PREPARE s FROM 'SELECT 1'", policy.ReasonUnsupported},
		{"EXECUTE s", policy.ReasonUnsupported},
		{"EXECUTE IMMEDIATE 'SELECT 1'", policy.ReasonUnsupported},
		{"LOAD DATA LOCAL INFILE '/etc/passwd' INTO TABLE t", policy.ReasonUnsupported},
		{"DROP TABLE t", policy.ReasonUnsupported},
		{"TRUNCATE t", policy.ReasonUnsupported},
		{"KILL 1", policy.ReasonUnsupported},
		{"LOCK TABLES t WRITE", policy.ReasonUnsupported},
		{"GRANT ALL ON *.* TO x", policy.ReasonUnsupported},
	} {
		got, err := Classify([]byte(c.statement), testSchema)
		var refusal *wire.Error
		if !errors.As(err, &refusal) || refusal.Reason != c.reason {
			t.Errorf("%q\n got %+v, %v\nwant a refusal as %s", c.statement, got, err, c.reason)
		}
	}
}

func TestNestingIsBounded(t *testing.T) {
	deep := "SELECT " + strings.Repeat("(", 100_000) + "1" + strings.Repeat(")", 100_000)

	_, err := Classify([]byte(deep), testSchema)

	var refusal *wire.Error
	if !errors.As(err, &refusal) || refusal.Reason != policy.ReasonUnsupported {
		t.Errorf("got %v, want a refusal as unsupported", err)
	}
}

func TestARefusalNeverRepeatsALiteral(t *testing.T) {
	for _, statement := range []string{"SELECT 'secret' 5 'secret'", "SELECT secret secret secret", "DROP secret", "secret"} {
		_, err := Classify([]byte(statement), testSchema)
		if err == nil || strings.Contains(err.Error(), "secret") {
			t.Errorf("%s: got %v, want a refusal without the word", statement, err)
		}
	}
}

func TestParametersOfPreparedStatementsAreValues(t *testing.T) {
	for _, c := range []struct{ statement, text string }{
		{"SELECT a FROM t WHERE b = ? AND c IN (?,?) LIMIT ?, ?", "mysql select read t"},
		{"SELECT a FROM t WHERE b LIKE ? ORDER BY ? LIMIT ? OFFSET ?", "mysql select read t"},
		{"SELECT ? + 1, CONCAT(?, 'x'), d + INTERVAL ? DAY FROM t WHERE a BETWEEN ? AND ?", "mysql select read t"},
		{"INSERT INTO t (a, b) VALUES (?, ?), (?,?)", "mysql insert write t"},
		{"UPDATE t SET a = ? WHERE b = ?", "mysql update write t"},
		{"DELETE FROM t WHERE a = ? LIMIT ?", "mysql delete write t"},
		{"SELECT '?' FROM t", "mysql select read t"},
	} {
		got, err := ClassifyPrepared([]byte(c.statement), testSchema)
		if err != nil || got.Text != c.text || got.Support {
			t.Errorf("%s\n got %+v, %v\nwant %s", c.statement, got, err, c.text)
		}
		if _, err := Classify([]byte(c.statement), testSchema); (err == nil) != strings.Contains(c.statement, "'?'") {
			t.Errorf("%s: outside a prepared statement %v", c.statement, err)
		}
	}
	for _, statement := range []string{
		"SELECT a FROM ?", "SELECT ?.a FROM t", "SELECT a AS ? FROM t", "SELECT ?a FROM t", "SELECT ?1 FROM t", "SELECT ?\xe4 FROM t", "SELECT a? FROM t",
		"SELECT ? ? FROM t", "? FROM t", "?", "SELECT SLEEP(?)", "SELECT `?` FROM `?`", "SHOW TABLES LIKE ?", "SELECT CAST(a AS CHAR(?)) FROM t",
		"SELECT a FROM t; SELECT ?", "CREATE TABLE t (a INT DEFAULT ?)", "SET NAMES ?", "SET AUTOCOMMIT = ?", "SELECT a INTO ? FROM t",
	} {
		got, err := ClassifyPrepared([]byte(statement), testSchema)
		var refusal *wire.Error
		if !errors.As(err, &refusal) {
			t.Errorf("%s: %+v, %v; want a refusal", statement, got, err)
		}
	}
}

func TestSystemVariablesAreAClosedList(t *testing.T) {
	for statement, text := range map[string]string{
		"SET @@session.autocommit = OFF": "mysql set autocommit", "set @@SESSION.autocommit=1": "mysql set autocommit",
		"SELECT @@session.sql_mode": "mysql select session sql_mode",
	} {
		if got, err := Classify([]byte(statement), testSchema); err != nil || got.Text != text || !got.Support {
			t.Errorf("%s: %+v, %v", statement, got, err)
		}
	}
	for _, statement := range []string{
		"SET @@global.autocommit = 1", "SET @@autocommit = 1", "SET @@session.sql_mode = ''", "SET @@session . autocommit = 1", "SET @@ session.autocommit = 1",
		"SET @@session.autocommit = 1, @@session.sql_mode = ''", "SET @@session.`autocommit` = 1", "SELECT @@session.sql_mode FROM t", "SELECT @@session.sql_mode, a FROM t",
		"SELECT @@session.version", "SELECT @@global.sql_mode", "SELECT a, @@session.sql_mode FROM t", "SELECT @@session.sql_mode; SELECT a FROM t",
		"INSERT INTO t (a) VALUES (@@session.sql_mode)", "SELECT a FROM t WHERE b = @@session.sql_mode", "SELECT @x", "SET @x = 1", "SELECT @@session.sql_mode INTO OUTFILE '/x'",
	} {
		got, err := Classify([]byte(statement), testSchema)
		var refusal *wire.Error
		if !errors.As(err, &refusal) {
			t.Errorf("%s: %+v, %v; want a refusal", statement, got, err)
		}
	}
}
