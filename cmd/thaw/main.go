// Command thaw starts containers without pulling them: see docs/.
//
// One file per noun; each is thin and leaves the work to the packages it names.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime/debug"
	"strings"
	"syscall"
	"unicode"

	"github.com/spf13/cobra"

	"github.com/thaw-project/thaw/kind"
)

// version is set by the build.
var version = ""

func buildVersion() string {
	if version != "" {
		return version
	}
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "unknown"
}

// usage marks errors in how the command was called.
type usage struct{ error }

func (u usage) Unwrap() error { return u.error }

// exitCode maps an error to the exit status documented in the root command's help.
func exitCode(err error) int {
	var u usage
	switch {
	case err == nil:
		return 0
	case errors.Is(err, context.Canceled):
		return 130
	case errors.As(err, &u):
		return 2
	}
	switch kind.Of(err) {
	case kind.Invalid:
		return 2
	case kind.NotFound:
		return 3
	case kind.InUse, kind.Exists:
		return 4
	case kind.Unavailable:
		return 5
	case kind.NoSpace:
		return 6
	case kind.Corrupt:
		return 7
	case kind.Denied, kind.ReadOnly:
		return 8
	case kind.Unsupported:
		return 9
	case kind.Canceled:
		return 130
	}
	return 1
}

const rootHelp = `Thaw makes containers start without being pulled.

It converts OCI images into thin volumes on a storage target, and a containerd
snapshotter starts containers straight from them.

Exit status:
  0  done               5  server not running or registry unreachable
  1  failed             6  no space left
  2  wrong usage/input  7  damaged data
  3  not found          8  permission denied, read-only
  4  in use or exists   9  newer format, or not supported here
  130  interrupted

An error is one line on standard error: what failed, where, and what to do.`

func newRoot() *cobra.Command {
	root := &cobra.Command{
		Use:           "thaw",
		Short:         "Start containers without pulling them",
		Long:          rootHelp,
		Version:       buildVersion(),
		SilenceUsage:  true,
		SilenceErrors: true,
		Args:          noArgs,
		RunE:          func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return usage{fmt.Errorf("%s: %w: see '%s --help'", cmd.CommandPath(), err, cmd.CommandPath())}
	})
	root.AddCommand(
		newServer(), newAttacher(), newImageManagement(), newSnapshotter(), newKeeper(), newImage(), newLvol(), newSnapshot(), newTarget(), newBridge(), newAttachment(), newBlock(), newCard(), newCache(), newCertificate(),
		newDoctor(), newContainerdConfig(),
	)
	// Cobra's own two print help and succeed for what is not there.
	root.InitDefaultCompletionCmd()
	root.InitDefaultHelpCmd()
	for _, c := range root.Commands() {
		switch c.Name() {
		case "completion":
			c.Args, c.RunE = noArgs, func(cmd *cobra.Command, _ []string) error { return cmd.Help() }
		case "help":
			c.Args = func(_ *cobra.Command, args []string) error {
				found, rest, err := root.Find(args)
				if err != nil || len(rest) > 0 {
					if found == nil {
						found = root
					}
					if len(rest) == 0 {
						rest = args
					}
					return usage{unknownCommand(found, rest[0])}
				}
				return nil
			}
		}
	}
	return root
}

func noArgs(cmd *cobra.Command, args []string) error { return exactArgs(0)(cmd, args) }

// exactArgs is cobra.ExactArgs with an error that says how to call the command.
func exactArgs(n int) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) == n {
			return nil
		}
		if n == 0 && cmd.HasSubCommands() {
			return usage{unknownCommand(cmd, args[0])}
		}
		return usage{fmt.Errorf("%s takes %d argument(s), got %d: call it as '%s'", cmd.CommandPath(), n, len(args), cmd.UseLine())}
	}
}

// unknownCommand says what cmd has instead of name.
func unknownCommand(cmd *cobra.Command, name string) error {
	cmd.SuggestionsMinimumDistance = 2
	if near := cmd.SuggestionsFor(name); len(near) > 0 {
		return fmt.Errorf("%s has no command %.40q: did you mean %s? See '%s --help'", cmd.CommandPath(), name, strings.Join(near, " or "), cmd.CommandPath())
	}
	return fmt.Errorf("%s has no command %.40q: see '%s --help'", cmd.CommandPath(), name, cmd.CommandPath())
}

// group returns a noun: a command that only holds verbs.
func group(use, short string, verbs ...*cobra.Command) *cobra.Command {
	cmd := &cobra.Command{
		Use: use, Short: short, Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(verbs...)
	return cmd
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := newRoot().ExecuteContext(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "thaw:", message(ctx, err))
	}
	os.Exit(exitCode(err))
}

// message is what a person reads, in one line: an interrupted command says just that,
// and what it left, if it said so.
func message(ctx context.Context, err error) string {
	var stopped interrupted
	switch {
	case ctx.Err() == nil || !errors.Is(err, context.Canceled) && kind.Of(err) != kind.Canceled:
		return oneLine(err.Error())
	case errors.As(err, &stopped):
		return "interrupted: " + stopped.left
	}
	return "interrupted"
}

// oneLine makes text fit for a terminal: a path or a name may hold anything.
func oneLine(text string) string {
	lines := strings.FieldsFunc(text, func(r rune) bool { return r == '\n' || r == '\r' })
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return unicode.ReplacementChar
	}, strings.Join(lines, "; "))
}

// interrupted says what a command that was interrupted left.
type interrupted struct {
	error
	left string
}

func (i interrupted) Unwrap() error { return i.error }
