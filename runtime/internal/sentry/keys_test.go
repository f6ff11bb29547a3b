//go:build sandbox

package sentry

import (
	"bufio"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"kalium.dev/kalium/runtime/internal/guard/guardtest"
)

// secureRequest is what the function sends to a TLS server by hand.
func secureRequest(path string) string {
	return "GET " + path + " HTTP/1.1\r\nHost: images.test:4443\r\n\r\n"
}

// trySecure runs inside of the sandbox. It sends requests over TLS with and without saying its keys.
func trySecure() map[string]string {
	got := map[string]string{
		"environment": os.Getenv("SSLKEYLOGFILE") + " " + os.Getenv("PYTHONPATH") + " " + os.Getenv("NODE_OPTIONS"),
	}
	for _, file := range []string{"keylog.cjs", "pysite/sitecustomize.py"} {
		_, err := os.ReadFile("/run/kalium/" + file)
		got[file] = name(err)
	}
	got["write beside them"] = name(os.WriteFile("/run/kalium/x", nil, 0o600))
	try := func(what string, version uint16, logs bool, path string) {
		config := &tls.Config{ServerName: "images.test", InsecureSkipVerify: true, MaxVersion: version}
		if logs {
			file, err := os.OpenFile(os.Getenv("SSLKEYLOGFILE"), os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
			if err != nil {
				got[what] = "open: " + name(err)
				return
			}
			defer file.Close()
			config.KeyLogWriter = file
		}
		conn, err := net.Dial("tcp4", "10.137.0.1:4443")
		if err != nil {
			got[what] = "connect: " + name(err)
			return
		}
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(patience))
		inside := tls.Client(conn, config)
		_, err = io.WriteString(inside, secureRequest(path))
		if err == nil {
			var line string
			if line, err = bufio.NewReader(inside).ReadString('\n'); err == nil {
				got[what] = strings.TrimSpace(line)
				return
			}
		}
		got[what] = name(err)
	}
	for text, version := range map[string]uint16{"1.2": tls.VersionTLS12, "1.3": tls.VersionTLS13} {
		try("allowed "+text, version, true, "/i")
		try("refused "+text, version, true, "/secret")
		try("without keys "+text, version, false, "/i")
	}
	file, err := os.OpenFile(keysPath, os.O_RDWR, 0)
	if err == nil {
		_, err = file.Read(make([]byte, 10))
	}
	got["read"] = name(err)
	info, err := os.Stat(keysPath)
	if err == nil {
		got["mode"] = info.Mode().String()
	}
	file, err = os.OpenFile(keysPath, os.O_WRONLY, 0)
	if err == nil {
		_, err = file.Write(make([]byte, 1<<20))
	}
	got["a long write"] = name(err)
	return got
}

func TestTLSOfAProgramThatSaysItsKeysIsOpened(t *testing.T) {
	s := newSite(t)
	listener := tls.NewListener(s.listen(4443), &tls.Config{Certificates: []tls.Certificate{guardtest.Certificate(t, "images.test")}})
	arrived := make(chan string, 64)
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				r := bufio.NewReader(conn)
				for {
					line, err := r.ReadString('\n')
					if err != nil {
						return
					}
					if strings.HasPrefix(line, "GET ") {
						arrived <- line
					}
					if line == "\r\n" {
						fmt.Fprint(conn, "HTTP/1.1 204 No Content\r\n\r\n")
					}
				}
			}()
		}
	}()
	wait := s.run("secure", true)

	answer := s.request(empty)
	wait()

	_, body, _ := strings.Cut(answer, "\r\n\r\n")
	var got map[string]string
	if err := json.Unmarshal([]byte(body), &got); err != nil {
		t.Fatalf("%v in %q", err, answer)
	}
	ok := "HTTP/1.1 204 No Content"
	for what, want := range map[string]string{
		"environment": "/dev/kalium-keys /run/kalium/pysite --require=/run/kalium/keylog.cjs", "keylog.cjs": "ok", "pysite/sitecustomize.py": "ok",
		"write beside them": "EROFS", "read": "EACCES", "mode": "Dc-w--w--w-", "a long write": "ok",
		"allowed 1.2": ok, "refused 1.2": "EPERM", "without keys 1.2": "EPERM",
		"allowed 1.3": ok, "refused 1.3": "EPERM", "without keys 1.3": "EPERM",
	} {
		if got[what] != want {
			t.Errorf("%s: %s, want %s", what, got[what], want)
		}
	}
	for range 2 {
		if line := <-arrived; line != "GET /i HTTP/1.1\r\n" {
			t.Errorf("%q arrived", line)
		}
	}
	if len(arrived) != 0 {
		t.Errorf("%q arrived, too", <-arrived)
	}
	s.told()
	if d := s.denials(); len(d) != 2 || !d["https not_in_policy"] || !d["https no_key"] {
		t.Errorf("denials %v", d)
	}
}
