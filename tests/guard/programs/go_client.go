// One HTTPS request by Go's own client: `go_client URL [COUNT]` prints the answer, or an error and exits 1. With COUNT it makes so
// many connections, a request on each, and prints the median time of one in microseconds.
package main

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"slices"
	"strconv"
	"time"
)

func get(client *http.Client, url string) (string, error) {
	answer, err := client.Get(url)
	if err != nil {
		return "", err
	}
	defer answer.Body.Close()
	body, err := io.ReadAll(answer.Body)
	if err == nil && answer.StatusCode != http.StatusOK {
		err = fmt.Errorf("status %d", answer.StatusCode)
	}
	return string(body), err
}

func main() {
	count := 0
	if len(os.Args) > 2 {
		count, _ = strconv.Atoi(os.Args[2])
	}
	client := &http.Client{Timeout: 10 * time.Second}
	said, err := get(client, os.Args[1])
	var times []time.Duration
	for i := 0; i < count && err == nil; i++ {
		client.CloseIdleConnections()
		began := time.Now()
		_, err = get(client, os.Args[1])
		times = append(times, time.Since(began))
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	if count > 0 {
		slices.Sort(times)
		said = strconv.FormatInt(times[len(times)/2].Microseconds(), 10)
	}
	fmt.Println(said)
}
