// Command drive finds a card's drive as the node does, for tests to run in a guest: it prints
// the path of the device node, and how long the kernel was waited for.
//
//	drive -uuid UUID -serial SERIAL [-function pcie:0:0:0 -address 0000:01:00.0] [-leave]
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"time"

	"github.com/thaw-project/thaw/node/present"
	"github.com/thaw-project/thaw/node/present/pcie"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "drive:", err)
		os.Exit(1)
	}
}

func run() (err error) {
	n := present.NVMe{}
	flag.StringVar(&n.UUID, "uuid", "", "the nvmeNamespace's")
	flag.StringVar(&n.Serial, "serial", "", "the controller's")
	flag.StringVar(&n.Function, "function", "", "the card's name of the function")
	address := flag.String("address", "", "where the host has that function")
	writable := flag.Bool("writable", false, "the drive must be writable")
	leave := flag.Bool("leave", false, "make ready for the drive to go, and end when standard input does")
	timeout := flag.Duration("timeout", time.Minute, "how long to wait")
	flag.Parse()
	o := pcie.Options{}
	if *address != "" {
		o.Functions = map[string]string{n.Function: *address}
	}
	f, err := pcie.New(o)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	ctx, cancel := context.WithTimeout(context.Background(), *timeout)
	defer cancel()
	if *leave {
		release, err := f.Leave(ctx, n)
		if err != nil {
			return err
		}
		return release()
	}
	begin := time.Now()
	path, err := f.Find(ctx, present.Disk{ID: "drive", NVMe: &n, ReadOnly: !*writable})
	if err != nil {
		return err
	}
	fmt.Println(path, time.Since(begin).Milliseconds(), "ms")
	return nil
}
