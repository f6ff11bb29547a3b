package sql

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"kalium.dev/kalium/runtime/internal/policy"
	"kalium.dev/kalium/runtime/internal/wire"
)

// FuzzClassify: only the declared error comes out; what is accepted is one known verb with sorted sets of tables, holds
// nothing that begins a second statement or leaves the tables, and means the same behind white space and a comment.
func FuzzClassify(f *testing.F) {
	for _, statement := range []string{
		"SELECT rowvalues FROM photoAssignmentTable WHERE rowkey = '200494'", "SELECT * FROM `helloRetail`.`t`, mysql.user",
		"SELECT a FROM t UNION ALL SELECT b FROM u ORDER BY 1 LIMIT 5", "SELECT 'it''s; \\' DROP TABLE x', \"y\" /* z */ FROM t -- u\n# v\nWHERE 1",
		"INSERT INTO t (a) VALUES (1) ON DUPLICATE KEY UPDATE a = VALUES(a) + 1", "REPLACE INTO other.t VALUES (1)",
		"UPDATE t a JOIN u b ON a.x = b.x SET a.y = b.y", "DELETE FROM a, b USING t AS a, u AS b, v", "SHOW TABLES LIKE 'x'",
		"START TRANSACTION READ ONLY", "COMMIT", "ROLLBACK", "SET NAMES utf8mb4", "SET AUTOCOMMIT = 0",
		"CREATE TABLE IF NOT EXISTS t (a VARCHAR(255) PRIMARY KEY, b LONGTEXT)", "SELECT _gbk'\xbf\x5c' FROM t", "SELECT /*!50000 1 */ FROM t",
		"SELECT @@session.sql_mode", "SET @@session.autocommit = OFF", "SELECT a FROM t WHERE b = ? LIMIT ?",
		"SELECT x'41', b'01', 0x41, 1.5e-3, .5 FROM t WHERE a->>'$.b' IN (1, 2)", "SELECT a INTO OUTFILE '/x' FROM t", "SELECT 1;",
	} {
		f.Add(statement)
	}
	verbs := []string{
		"show-tables", "select", "insert", "update", "delete", "replace", "begin", "commit", "rollback", "create-table",
	}
	f.Fuzz(func(t *testing.T, statement string) {
		got, err := Classify([]byte(statement), testSchema)
		prepared, errPrepared := ClassifyPrepared([]byte(statement), testSchema)
		if err != nil {
			var refused *wire.Error
			if !errors.As(err, &refused) || errPrepared == nil && !strings.Contains(statement, "?") || errPrepared != nil && !errors.As(errPrepared, &refused) {
				t.Fatalf("%v, prepared %v", err, errPrepared)
			}
			return
		}
		if errPrepared != nil || prepared.Text != got.Text {
			t.Fatalf("prepared: %#v, %v; otherwise %#v", prepared, errPrepared, got)
		}
		rising := func(names []string) bool {
			for i := 1; i < len(names); i++ {
				if names[i] <= names[i-1] {
					return false
				}
			}
			return true
		}
		if got.Support != (got.Verb == "") || !got.Support && !slices.Contains(verbs, got.Verb) || !rising(got.Read) || !rising(got.Write) {
			t.Fatalf("%#v", got)
		}
		if got.Text != policy.Printable(got.Text, policy.MessageTextMax) || strings.Contains(statement, "/*!") && !strings.ContainsAny(statement, "'\"`#-") {
			t.Fatalf("%q is %#v", statement, got)
		}
		again, err := Classify([]byte(" \n/* a comment */ "+statement), testSchema)
		if err != nil || again.Text != got.Text || again.Support != got.Support || !slices.Equal(again.Read, got.Read) || !slices.Equal(again.Write, got.Write) {
			t.Fatalf("behind a comment: %#v, %v; before %#v", again, err, got)
		}
	})
}
