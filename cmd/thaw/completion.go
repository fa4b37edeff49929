package main

import (
	"context"
	"time"

	"github.com/spf13/cobra"

	attacherv1 "github.com/thaw-project/thaw/api/attacher/v1"
)

// completeWithin is how long a shell waits for names after the tab key.
const completeWithin = 2 * time.Second

// completeNames offers what the server has in the place of a verb's first argument.
// Without a server there is nothing to offer.
func completeNames(where *place, names func(context.Context, attacherv1.AttacherClient) ([]string, error)) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
		if len(args) > 0 {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		ctx, cancel := context.WithTimeout(cmd.Context(), completeWithin)
		defer cancel()
		client, done, err := where.attacherClient(ctx)
		if err != nil {
			return nil, cobra.ShellCompDirectiveError
		}
		defer done()
		found, err := names(ctx, client)
		if err != nil {
			return nil, cobra.ShellCompDirectiveError
		}
		return found, cobra.ShellCompDirectiveNoFileComp
	}
}

func lvolNames(ctx context.Context, c attacherv1.AttacherClient) ([]string, error) {
	r, err := c.ListLvols(ctx, &attacherv1.ListLvolsRequest{})
	if err != nil {
		return nil, err
	}
	var names []string
	for _, l := range r.Lvols {
		names = append(names, l.Name)
	}
	return names, nil
}

func imageNames(ctx context.Context, c attacherv1.AttacherClient) ([]string, error) {
	r, err := c.ListImages(ctx, &attacherv1.ListImagesRequest{})
	if err != nil {
		return nil, err
	}
	var names []string
	for _, i := range r.Images {
		names = append(names, i.Reference)
	}
	return names, nil
}

// oneOf offers the values of a flag that has few.
func oneOf(cmd *cobra.Command, flag string, values ...string) {
	err := cmd.RegisterFlagCompletionFunc(flag, cobra.FixedCompletions(values, cobra.ShellCompDirectiveNoFileComp))
	if err != nil {
		panic(err) // no flag of that name: a mistake in this program
	}
}
