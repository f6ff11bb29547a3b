package main

import (
	"os"
	"os/signal"
	"syscall"
)

// pause waits for the end, and takes the exit statuses of processes whose parents ended: in a pod whose containers share their processes
// it is the first.
func pause() error {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGCHLD)
	for which := range signals {
		if which != syscall.SIGCHLD {
			return nil
		}
		for {
			if pid, err := syscall.Wait4(-1, nil, syscall.WNOHANG, nil); pid <= 0 || err != nil {
				break
			}
		}
	}
	return nil
}
